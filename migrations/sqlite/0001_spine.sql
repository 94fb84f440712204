-- The spine: tasks, their events and transcripts, idempotency, pauses, keys.
-- Times are microseconds since the Unix epoch, JSON is text, ids are UUIDv7 text.
-- Forward only; a later version adds, and removes one version after.

-- A task. The row is the truth about its state; queue and relay are rebuilt from it.
CREATE TABLE tasks (
    id                TEXT    NOT NULL PRIMARY KEY,
    namespace         TEXT    NOT NULL,
    model             TEXT    NOT NULL,          -- owner/name
    version           TEXT,
    input             TEXT    NOT NULL,          -- JSON object
    params            TEXT    NOT NULL,          -- JSON object
    priority          INTEGER NOT NULL,
    labels            TEXT    NOT NULL,          -- JSON object of strings
    required_labels   TEXT    NOT NULL,          -- JSON object of strings
    deadline          INTEGER,
    start_timeout     INTEGER,                   -- microseconds
    execution_timeout INTEGER NOT NULL,          -- microseconds
    retry             TEXT    NOT NULL,          -- JSON, the retry policy
    seed              INTEGER NOT NULL,
    session_id        TEXT,
    request_id        TEXT,
    retry_of          TEXT,
    retried_by        TEXT,
    traceparent       TEXT,
    create_time       INTEGER NOT NULL,
    -- What moves, from here on; `revision` grows by one with every change.
    state             TEXT    NOT NULL,
    revision          INTEGER NOT NULL,
    attempt           INTEGER NOT NULL,
    failed            INTEGER NOT NULL,
    lost              INTEGER NOT NULL,
    handed_back       INTEGER NOT NULL,
    start_time        INTEGER,
    end_time          INTEGER,
    not_before        INTEGER,
    runner_id         TEXT,
    base_sequence     INTEGER NOT NULL,
    last_sequence     INTEGER NOT NULL,
    reserved_sequence INTEGER NOT NULL,
    result            TEXT,                      -- JSON object
    error             TEXT,                      -- JSON, the failure
    usage             TEXT                       -- JSON, the usage
) STRICT, WITHOUT ROWID;

-- Lists of a namespace, newest first.
CREATE INDEX tasks_by_namespace ON tasks (namespace, id);
-- Lists by state where states are rare: open tasks and dead letters.
CREATE INDEX tasks_open ON tasks (state, id) WHERE state IN ('QUEUED', 'RUNNING', 'DEAD_LETTERED');

-- Submits of the last 24 hours by their idempotency key.
CREATE TABLE request_ids (
    namespace   TEXT    NOT NULL,
    request_id  TEXT    NOT NULL,
    task_id     TEXT    NOT NULL,
    digest      BLOB    NOT NULL,                -- SHA-256 of the request
    create_time INTEGER NOT NULL,
    PRIMARY KEY (namespace, request_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX request_ids_by_time ON request_ids (create_time);

-- Timeline entries: server-made ones, and the runner's stages and artifacts. Never updated.
CREATE TABLE task_events (
    position  INTEGER PRIMARY KEY AUTOINCREMENT, -- order of commits, for watchers
    task_id   TEXT    NOT NULL,
    namespace TEXT    NOT NULL,
    sequence  INTEGER NOT NULL,
    kind      TEXT    NOT NULL,
    time      INTEGER NOT NULL,
    frame     BLOB    NOT NULL                   -- encoded TaskEvent
) STRICT;
CREATE UNIQUE INDEX task_events_by_task ON task_events (task_id, sequence);

-- Runner-made entries of open and recently ended tasks: length-delimited frames with
-- the contiguous sequences first..last.
CREATE TABLE segments (
    task_id        TEXT    NOT NULL,
    attempt        INTEGER NOT NULL,
    first_sequence INTEGER NOT NULL,
    last_sequence  INTEGER NOT NULL,
    frames         BLOB    NOT NULL,
    PRIMARY KEY (task_id, first_sequence)        -- a small index; rows are only appended
) STRICT;

-- Where the archived transcript of an ended task lies: a range of a blob.
CREATE TABLE transcripts (
    task_id        TEXT    NOT NULL PRIMARY KEY,
    blob           TEXT    NOT NULL,             -- lower-case hex SHA-256
    "offset"       INTEGER NOT NULL,
    length         INTEGER NOT NULL,
    first_sequence INTEGER NOT NULL,
    last_sequence  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX transcripts_by_blob ON transcripts (blob);

-- Paused queues.
CREATE TABLE queue_pauses (
    namespace  TEXT    NOT NULL,
    model      TEXT    NOT NULL,
    paused_by  TEXT    NOT NULL,
    reason     TEXT    NOT NULL,
    pause_time INTEGER NOT NULL,
    PRIMARY KEY (namespace, model)
) STRICT, WITHOUT ROWID;

-- API keys, without their secrets.
CREATE TABLE api_keys (
    id             TEXT    NOT NULL PRIMARY KEY,
    namespace      TEXT    NOT NULL,
    display_name   TEXT    NOT NULL,
    secret_hash    BLOB    NOT NULL,             -- SHA-256 of the secret part
    scopes         TEXT    NOT NULL,             -- JSON list
    create_time    INTEGER NOT NULL,
    expire_time    INTEGER,
    revoke_time    INTEGER,
    last_used_time INTEGER
) STRICT;

-- What the installation made for itself, such as its signing key.
CREATE TABLE settings (
    name  TEXT NOT NULL PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
