-- Entries and segments are written with the row of their task moved or held in the same transaction,
-- and deleted with it. A check of each entry cost the server a third of what it spends on a task.
ALTER TABLE task_events DROP CONSTRAINT IF EXISTS task_events_task_id_fkey;
ALTER TABLE segments DROP CONSTRAINT IF EXISTS segments_task_id_fkey;
