-- Functions that decisions and the fold use. They are made again whenever a file is opened for writing, so that a file
-- cannot have other functions of the same names.
--
-- `/` makes DOUBLEs in DuckDB, so nano-dollars become dollars by an exact decimal product. The way back converts whole
-- dollars and fraction separately: a product of both needs more digits than a machine word has, and takes 40 times as
-- long.

CREATE OR REPLACE MACRO usd(nanousd) AS (nanousd::BIGINT::DECIMAL(18, 0) * 0.000000001::DECIMAL(9, 9))::DECIMAL(18, 9);
CREATE OR REPLACE MACRO fraction(dollars) AS (dollars::DECIMAL(18, 9) - trunc(dollars::DECIMAL(18, 9)))::DECIMAL(9, 9);
CREATE OR REPLACE MACRO nanousd(dollars) AS trunc(dollars::DECIMAL(18, 9))::BIGINT * 1000000000
    + (fraction(dollars) * 999999999::DECIMAL(9, 0) + fraction(dollars))::BIGINT;

-- What a row of `budgets` adds to its checksum. A fold subtracts the old balance and adds the new one, so that a row
-- that others have changed stays wrong, however often it is folded.
CREATE OR REPLACE MACRO balance_hash(budget, settled, held) AS
    hash(budget, settled::DECIMAL(18, 9), held::DECIMAL(18, 9));

-- The value part of a balance's key: its attributes' values, as joined by budget_value() in schemas/identifiers.py.
CREATE OR REPLACE MACRO budget_value(parts) AS CASE len(parts)
    WHEN 0 THEN 'all'
    WHEN 1 THEN parts[1]
    ELSE array_to_string(list_transform(parts, lambda part: replace(replace(part, '%', '%25'), ',', '%2C')), ',')
END;

-- The name of a user's budget, as made by budget_name() in schemas/identifiers.py.
CREATE OR REPLACE MACRO user_budget(user_id, period) AS 'user:' || user_id || ':' || period;
