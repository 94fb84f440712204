-- Artifacts: what they are called, where their bytes are, and what is under way.

-- An artifact: complete bytes with a name. Immutable.
CREATE TABLE artifacts (
    id          TEXT    NOT NULL PRIMARY KEY,
    namespace   TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    type        TEXT    NOT NULL,
    mime_type   TEXT    NOT NULL,
    size_bytes  INTEGER NOT NULL,
    sha256      TEXT    NOT NULL,                -- lower-case hex
    task_id     TEXT,                            -- that made it
    attempt     INTEGER NOT NULL,                -- that made it; 0 for none
    created_by  TEXT    NOT NULL,
    create_time INTEGER NOT NULL,
    expire_time INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX artifacts_by_namespace ON artifacts (namespace, id);
CREATE INDEX artifacts_by_bytes ON artifacts (type, sha256);
CREATE INDEX artifacts_by_task ON artifacts (task_id) WHERE task_id IS NOT NULL;
CREATE INDEX artifacts_by_expiry ON artifacts (expire_time) WHERE expire_time IS NOT NULL;

-- The bytes of artifacts, whether there yet or not: the row is made before the bytes are, and
-- goes after they went, so that none are ever in the store that no row knows.
CREATE TABLE artifact_bytes (
    type        TEXT    NOT NULL,
    sha256      TEXT    NOT NULL,
    size_bytes  INTEGER NOT NULL,
    deleting    INTEGER NOT NULL,                -- 1 while they are being deleted
    touch_time  INTEGER NOT NULL,                -- somebody was about to refer to them
    PRIMARY KEY (type, sha256)
) STRICT, WITHOUT ROWID;

-- Uploads: announced, and how far they have come.
CREATE TABLE uploads (
    id          TEXT    NOT NULL PRIMARY KEY,
    namespace   TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    type        TEXT    NOT NULL,
    mime_type   TEXT    NOT NULL,
    size_bytes  INTEGER,                         -- as announced
    sha256      TEXT,                            -- as announced
    ttl         INTEGER,                         -- microseconds, of the artifact
    task_id     TEXT,                            -- the attempt whose token began it
    attempt     INTEGER NOT NULL,
    created_by  TEXT    NOT NULL,
    create_time INTEGER NOT NULL,
    expire_time INTEGER NOT NULL,
    received    INTEGER NOT NULL,                -- bytes that are safe
    checkpoint  TEXT,                            -- JSON, what resuming needs
    artifact_id TEXT                             -- that it became
) STRICT, WITHOUT ROWID;
CREATE INDEX uploads_by_digest ON uploads (namespace, sha256);
CREATE INDEX uploads_by_expiry ON uploads (expire_time);

-- Artifacts that tasks read, written before the task is; without a task it counts for nothing.
CREATE TABLE artifact_inputs (
    artifact_id TEXT    NOT NULL,
    task_id     TEXT    NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (artifact_id, task_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX artifact_inputs_by_task ON artifact_inputs (task_id);

-- What each namespace keeps, moved with every artifact.
CREATE TABLE artifact_usage (
    namespace   TEXT    NOT NULL PRIMARY KEY,
    artifacts   INTEGER NOT NULL,
    bytes       INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
