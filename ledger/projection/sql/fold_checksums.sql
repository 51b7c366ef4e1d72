-- In two steps, for the reason given in fold_counters.sql.
UPDATE checksums AS c SET events = c.events + s.events, checksum = c.checksum + s.checksum
FROM sums_of_blocks AS s
WHERE c.partition = s.partition AND c.block = s.block;

INSERT INTO checksums BY NAME
FROM sums_of_blocks
ANTI JOIN checksums USING (partition, block);
