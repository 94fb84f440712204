-- Several servers on one database: who they are, what each holds, and what one of them does.
-- A server alone on a file has its tables, and uses none of them. Times are the database's.

-- Server that holds the runner of a RUNNING task.
ALTER TABLE tasks ADD COLUMN instance_id TEXT;

-- Servers that were there within the last day.
CREATE TABLE instances (
    id             TEXT NOT NULL PRIMARY KEY,
    version        TEXT NOT NULL,
    address        TEXT NOT NULL,                 -- where it listens, for people
    draining       INTEGER NOT NULL,
    start_time     INTEGER NOT NULL,
    heartbeat_time INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What one server at a time does.
CREATE TABLE locks (
    name   TEXT NOT NULL PRIMARY KEY,
    holder TEXT NOT NULL,
    epoch  INTEGER NOT NULL,                         -- grows with every change of hands
    until  INTEGER NOT NULL                          -- others may take it then
) STRICT, WITHOUT ROWID;

-- Runners as the servers that hold them show them.
CREATE TABLE runners (
    namespace    TEXT NOT NULL,
    runner_id    TEXT NOT NULL,
    instance_id  TEXT NOT NULL,
    connect_time INTEGER NOT NULL,
    seen         BLOB NOT NULL,                   -- encoded Runner
    PRIMARY KEY (namespace, runner_id)
) STRICT, WITHOUT ROWID;

-- What operators ask of runners that another server holds.
CREATE TABLE runner_orders (
    id          TEXT NOT NULL PRIMARY KEY,
    instance_id TEXT NOT NULL,                    -- the server that holds the runner
    namespace   TEXT NOT NULL,
    kind        TEXT NOT NULL,                    -- which method was called
    request     BLOB NOT NULL,                    -- its encoded request
    wait        INTEGER NOT NULL,                   -- microseconds
    create_time INTEGER NOT NULL,
    taken       INTEGER NOT NULL,
    answer      BLOB                              -- encoded google.rpc.Status
) STRICT, WITHOUT ROWID;
CREATE INDEX runner_orders_to_take ON runner_orders (instance_id) WHERE taken = 0;
