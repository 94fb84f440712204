-- Bytes lie under their digest and a generation, which is another one each time that they are kept.
-- What nobody needs any more moves to a table of its own and is deleted from there: no deletion,
-- however late, hits what was kept since. Without a generation are bytes from before.

ALTER TABLE artifacts ADD COLUMN generation TEXT NOT NULL DEFAULT '';
ALTER TABLE artifact_bytes ADD COLUMN generation TEXT NOT NULL DEFAULT '';

-- Bytes that nobody refers to, nor ever will: from when they left artifact_bytes until they are
-- deleted.
CREATE TABLE artifact_garbage (
    type         TEXT   NOT NULL,
    sha256       TEXT   NOT NULL,
    generation   TEXT   NOT NULL,
    condemn_time BIGINT NOT NULL,
    PRIMARY KEY (type, sha256, generation)
);

-- Deletions that were begun. Since then artifact_bytes.deleting is 0.
INSERT INTO artifact_garbage (type, sha256, generation, condemn_time)
    SELECT type, sha256, generation, touch_time FROM artifact_bytes WHERE deleting = 1;
DELETE FROM artifact_bytes WHERE deleting = 1;

-- Parts of uploads on their way lie where their bytes will be.
CREATE INDEX uploads_by_place ON uploads (type, sha256) WHERE checkpoint IS NOT NULL;
