-- Artifacts: what they are called, where their bytes are, and what is under way.

-- An artifact: complete bytes with a name. Immutable.
CREATE TABLE artifacts (
    id          UUID   NOT NULL PRIMARY KEY,
    namespace   TEXT   NOT NULL,
    name        TEXT   NOT NULL,
    type        TEXT   NOT NULL,
    mime_type   TEXT   NOT NULL,
    size_bytes  BIGINT NOT NULL,
    sha256      TEXT   NOT NULL,                 -- lower-case hex
    task_id     UUID,                            -- that made it
    attempt     BIGINT NOT NULL,                 -- that made it; 0 for none
    created_by  TEXT   NOT NULL,
    create_time BIGINT NOT NULL,
    expire_time BIGINT
);
CREATE INDEX artifacts_by_namespace ON artifacts (namespace, id);
CREATE INDEX artifacts_by_bytes ON artifacts (type, sha256);
CREATE INDEX artifacts_by_task ON artifacts (task_id) WHERE task_id IS NOT NULL;
CREATE INDEX artifacts_by_expiry ON artifacts (expire_time) WHERE expire_time IS NOT NULL;

-- The bytes of artifacts, whether there yet or not: the row is made before the bytes are, and
-- goes after they went, so that none are ever in the store that no row knows.
CREATE TABLE artifact_bytes (
    type        TEXT   NOT NULL,
    sha256      TEXT   NOT NULL,
    size_bytes  BIGINT NOT NULL,
    deleting    BIGINT NOT NULL,                 -- 1 while they are being deleted
    touch_time  BIGINT NOT NULL,                 -- somebody was about to refer to them
    PRIMARY KEY (type, sha256)
);

-- Uploads: announced, and how far they have come.
CREATE TABLE uploads (
    id          UUID   NOT NULL PRIMARY KEY,
    namespace   TEXT   NOT NULL,
    name        TEXT   NOT NULL,
    type        TEXT   NOT NULL,
    mime_type   TEXT   NOT NULL,
    size_bytes  BIGINT,                          -- as announced
    sha256      TEXT,                            -- as announced
    ttl         BIGINT,                          -- microseconds, of the artifact
    task_id     UUID,                            -- the attempt whose token began it
    attempt     BIGINT NOT NULL,
    created_by  TEXT   NOT NULL,
    create_time BIGINT NOT NULL,
    expire_time BIGINT NOT NULL,
    received    BIGINT NOT NULL,                 -- bytes that are safe
    checkpoint  TEXT,                            -- JSON, what resuming needs
    artifact_id UUID                             -- that it became
);
CREATE INDEX uploads_by_digest ON uploads (namespace, sha256);
CREATE INDEX uploads_by_expiry ON uploads (expire_time);

-- Artifacts that tasks read, written before the task is; without a task it counts for nothing.
CREATE TABLE artifact_inputs (
    artifact_id UUID   NOT NULL,
    task_id     UUID   NOT NULL,
    create_time BIGINT NOT NULL,
    PRIMARY KEY (artifact_id, task_id)
);
CREATE INDEX artifact_inputs_by_task ON artifact_inputs (task_id);

-- What each namespace keeps, moved with every artifact.
CREATE TABLE artifact_usage (
    namespace   TEXT   NOT NULL PRIMARY KEY,
    artifacts   BIGINT NOT NULL,
    bytes       BIGINT NOT NULL
);
