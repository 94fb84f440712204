-- Nothing to do: entries and segments are not checked against tasks here.
SELECT 1;
