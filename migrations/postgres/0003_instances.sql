-- Several servers on one database: who they are, what each holds, and what one of them does.
-- A server alone on a file has its tables, and uses none of them. Times are the database's.

-- Server that holds the runner of a RUNNING task.
ALTER TABLE tasks ADD COLUMN instance_id UUID;

-- Servers that were there within the last day.
CREATE TABLE instances (
    id             UUID NOT NULL PRIMARY KEY,
    version        TEXT NOT NULL,
    address        TEXT NOT NULL,                 -- where it listens, for people
    draining       BOOLEAN NOT NULL,
    start_time     BIGINT NOT NULL,
    heartbeat_time BIGINT NOT NULL
);

-- What one server at a time does.
CREATE TABLE locks (
    name   TEXT NOT NULL PRIMARY KEY,
    holder UUID NOT NULL,
    epoch  BIGINT NOT NULL,                         -- grows with every change of hands
    until  BIGINT NOT NULL                          -- others may take it then
);

-- Time limits that have passed.
CREATE INDEX tasks_by_deadline ON tasks (deadline)
    WHERE deadline IS NOT NULL AND state IN ('QUEUED', 'RUNNING');
CREATE INDEX tasks_by_start_limit ON tasks ((create_time + start_timeout))
    WHERE start_timeout IS NOT NULL AND state = 'QUEUED' AND attempt = 0;

-- The transaction that added an entry: what watchers see in the order of commits, since positions
-- are given before.
ALTER TABLE task_events ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX task_events_by_xid ON task_events (xid);

-- Runners as the servers that hold them show them.
CREATE TABLE runners (
    namespace    TEXT NOT NULL,
    runner_id    TEXT NOT NULL,
    instance_id  UUID NOT NULL,
    connect_time BIGINT NOT NULL,
    seen         BYTEA NOT NULL,                   -- encoded Runner
    PRIMARY KEY (namespace, runner_id)
);

-- What operators ask of runners that another server holds.
CREATE TABLE runner_orders (
    id          UUID NOT NULL PRIMARY KEY,
    instance_id UUID NOT NULL,                    -- the server that holds the runner
    namespace   TEXT NOT NULL,
    kind        TEXT NOT NULL,                    -- which method was called
    request     BYTEA NOT NULL,                    -- its encoded request
    wait        BIGINT NOT NULL,                   -- microseconds
    create_time BIGINT NOT NULL,
    taken       BOOLEAN NOT NULL,
    answer      BYTEA                              -- encoded google.rpc.Status
);
CREATE INDEX runner_orders_to_take ON runner_orders (instance_id) WHERE NOT taken;
