-- The spine: tasks, their events and transcripts, idempotency, pauses, keys.
-- Times are microseconds since the Unix epoch, ids are UUIDv7. A JSON document with U+0000 in
-- it, which JSONB cannot hold, is kept as a JSON string: its text in base64.
-- Forward only; a later version adds, and removes one version after.

-- A task. The row is the truth about its state; queue and relay are rebuilt from it.
CREATE TABLE tasks (
    id                UUID    NOT NULL PRIMARY KEY,
    namespace         TEXT    NOT NULL,
    model             TEXT    NOT NULL,          -- owner/name
    version           TEXT,
    input             JSONB   NOT NULL,          -- object
    params            JSONB   NOT NULL,          -- object
    priority          BIGINT  NOT NULL,
    labels            JSONB   NOT NULL,          -- object of strings
    required_labels   JSONB   NOT NULL,          -- object of strings
    deadline          BIGINT,
    start_timeout     BIGINT,                    -- microseconds
    execution_timeout BIGINT  NOT NULL,          -- microseconds
    retry             JSONB   NOT NULL,          -- the retry policy
    seed              BIGINT  NOT NULL,
    session_id        TEXT,
    request_id        TEXT,
    retry_of          UUID,
    retried_by        UUID,
    traceparent       TEXT,
    create_time       BIGINT  NOT NULL,
    -- What moves, from here on; `revision` grows by one with every change.
    state             TEXT    NOT NULL,
    revision          BIGINT  NOT NULL,
    attempt           BIGINT  NOT NULL,
    failed            BIGINT  NOT NULL,
    lost              BIGINT  NOT NULL,
    handed_back       BIGINT  NOT NULL,
    start_time        BIGINT,
    end_time          BIGINT,
    not_before        BIGINT,
    runner_id         TEXT,
    base_sequence     BIGINT  NOT NULL,
    last_sequence     BIGINT  NOT NULL,
    reserved_sequence BIGINT  NOT NULL,
    result            JSONB,                     -- object
    error             JSONB,                     -- the failure
    usage             JSONB                      -- the usage
) WITH (
    -- Rows move a few times in their life: room beside them, and frequent cleaning.
    fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000
);

-- Lists of a namespace, newest first.
CREATE INDEX tasks_by_namespace ON tasks (namespace, id);
-- Lists by state where states are rare: open tasks and dead letters.
CREATE INDEX tasks_open ON tasks (state, id) WHERE state IN ('QUEUED', 'RUNNING', 'DEAD_LETTERED');

-- Submits of the last 24 hours by their idempotency key.
CREATE TABLE request_ids (
    namespace   TEXT   NOT NULL,
    request_id  TEXT   NOT NULL,
    task_id     UUID   NOT NULL,
    digest      BYTEA  NOT NULL,                 -- SHA-256 of the request
    create_time BIGINT NOT NULL,
    PRIMARY KEY (namespace, request_id)
);
CREATE INDEX request_ids_by_time ON request_ids (create_time);

-- Timeline entries: server-made ones, and the runner's stages and artifacts. Never updated.
CREATE TABLE task_events (
    position  BIGSERIAL PRIMARY KEY,             -- order of commits, for watchers
    task_id   UUID   NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    namespace TEXT   NOT NULL,
    sequence  BIGINT NOT NULL,
    kind      TEXT   NOT NULL,
    time      BIGINT NOT NULL,
    frame     BYTEA  NOT NULL                    -- encoded TaskEvent
);
CREATE UNIQUE INDEX task_events_by_task ON task_events (task_id, sequence);

-- Runner-made entries of open and recently ended tasks: length-delimited frames with
-- the contiguous sequences first..last.
CREATE TABLE segments (
    task_id        UUID   NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    attempt        BIGINT NOT NULL,
    first_sequence BIGINT NOT NULL,
    last_sequence  BIGINT NOT NULL,
    frames         BYTEA  NOT NULL,
    PRIMARY KEY (task_id, first_sequence)
);
-- Frames do not shrink enough to be worth the time.
ALTER TABLE segments ALTER COLUMN frames SET STORAGE EXTERNAL;

-- Where the archived transcript of an ended task lies: a range of a blob.
CREATE TABLE transcripts (
    task_id        UUID   NOT NULL PRIMARY KEY REFERENCES tasks (id) ON DELETE CASCADE,
    blob           TEXT   NOT NULL,              -- lower-case hex SHA-256
    "offset"       BIGINT NOT NULL,
    length         BIGINT NOT NULL,
    first_sequence BIGINT NOT NULL,
    last_sequence  BIGINT NOT NULL
);
CREATE INDEX transcripts_by_blob ON transcripts (blob);

-- Paused queues.
CREATE TABLE queue_pauses (
    namespace  TEXT   NOT NULL,
    model      TEXT   NOT NULL,
    paused_by  TEXT   NOT NULL,
    reason     TEXT   NOT NULL,
    pause_time BIGINT NOT NULL,
    PRIMARY KEY (namespace, model)
);

-- API keys, without their secrets.
CREATE TABLE api_keys (
    id             TEXT   NOT NULL PRIMARY KEY,
    namespace      TEXT   NOT NULL,
    display_name   TEXT   NOT NULL,
    secret_hash    BYTEA  NOT NULL,              -- SHA-256 of the secret part
    scopes         TEXT   NOT NULL,              -- JSON list
    create_time    BIGINT NOT NULL,
    expire_time    BIGINT,
    revoke_time    BIGINT,
    last_used_time BIGINT
);

-- What the installation made for itself, such as its signing key.
CREATE TABLE settings (
    name  TEXT  NOT NULL PRIMARY KEY,
    value BYTEA NOT NULL
);
