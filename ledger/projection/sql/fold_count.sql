-- For the check before a fold: a batch must continue the ledger without gap or repeat.
SELECT
    count(*) AS events,
    min(seq) AS first_seq,
    max(seq) AS last_seq,
    count(DISTINCT seq) AS distinct_seqs,
    arg_max(id, seq) AS last_id
FROM incoming;
