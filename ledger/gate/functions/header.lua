#!lua name=tollbook_v2
--[[
The budget gate: the only writer of the ledger, its holds and its balances.

Every function runs as one atomic step. Each reads and decides first and writes last, and its first
write goes to a key that it has not read. So a key of the wrong type or a refused argument changes
nothing: Redis does not undo what a function wrote before an error. Amounts are integer
nano-dollars; they and their sums stay below 2^53, where a Lua number is exact. Time is the
Redis clock. A reply is an array: a code, then its values; ledger/gate/replies.py reads them.
A line that enforces a guarantee has its number as a comment, such as G1.

Keys, all with the hash tag of one partition:
  meta      hash   ledger_id, partitions, trimmed_to (the watermark), removed (events trimmed off the
                   stream: an event's sequence number is `removed` plus its place in the stream),
                   removed_to (id of the last of them), stopped (why no call may begin; absent while they may),
                   stopped_seen, stopped_at (the newest event that the projector had folded that stopped them, and
                   its data directory), projector, projector_epoch (whose word counts, and its lease's epoch),
                   recovering (the payload of the event that ends a recovery under way), policy_version, policy_digest
                   and policy (of the policy in force, the last one the payload of its event; absent: version 0)
  ledger    stream the events
  holds     zset   call id of each open hold -> its deadline in ms
  waiters   hash   budget -> 1 while a call waits for its holds to settle
  account   hash   plan, cap_nanousd, credit:<period> of one user, as the ledger assigned them
  call      string the record of one call, in lines (one write, and readable with GET; the only
                   other reader is ledger/gate/call_record.py):
                   1 state (open | closed | settled | denied), content hash, hold number,
                     amount held, worker, deadline ms, user, period, attempts recorded,
                     attempts begun, spent by recorded attempts of this hold, assumed part of it,
                     cap of the user's period, and the plan in force, as the latest hold found them
                   2 settled holds, each "number=cost,assumed"; if they stood against other budgets
                     than the latest hold, followed by a tab, their period, and their budgets, with
                     tabs between, and the character 1 for a space
                   3 marks of recorded attempt events (m1 f1 x2), so that a repeat adds none; while a hold is open,
                     "g1=provider=id" is the provider's id of attempt 1, once its reply has begun
                   4 the denial, "budget settled held cap amount reason"
                   5.. the budgets of the hold; those that a policy opened while it was open are the last
  result    string the task's result as JSON
  credits   hash   budget -> its credit; "budget lots" -> what its credits have left, see `read_lots`
  alerts    hash   "budget fraction" -> id of the event that raised this alert
  keys      hash   of the gateway, in partition 0: hash of a key -> when it was created in ms, as `created_ms`, and what
                   it is bound to: the payload of its event; "hash revoked" -> the payload of the event that revoked it;
                   key id -> hash
  tail      list   of one budget: "id dS dH S H": deltas of settled and held, and both after it
credits and alerts are not among the KEYS: few calls need them, and every key has its price. They stand beside meta.
keys is, but for restore.

The first argument is "ledger_id seen version": the id of the newest event that the caller was ever told of, or 0-0, and
the version of the policy by which it decides. Where that event is neither on the stream nor archived, the ledger went
back in time, and nothing is written. The version is compared where money is decided about; who names none means 0.

A budget argument is "cap settled held q_ms q_n q_seq name": the cap, and the baseline folded at
ledger position Q (entry id q_ms-q_n, sequence number q_seq); or, where the baseline is needed only
if the tail is empty, the name alone ("user:u42:2026-11", "team-week~3:red:2026-W48"). Short values share one
argument: a client takes longer to pack one more argument than the server to split one.

Codes:
  OK        done; the values depend on the function
  EXISTS    done before, by an earlier call of the function with the same id
  CONFLICT  the id was used before with other content
  DENIED    settled spend and the amount pass the cap, or the wait is over: budget settled held cap
  WAIT      only open holds are in the way: budget settled held cap
  STALE     the baseline is older than the tail: budget
  AHEAD     the projection has folded events that the ledger does not have: folded seq, ledger seq
  DIVERGED  the baseline differs from the tail at the same position: budget, its settled and held, the tail's
  LEDGER    the keys belong to another ledger: its id
  BACK      the ledger lacks an event that the caller was told of: the event's id
  STOPPED   no call may begin: why
  POLICY    the caller decides by another policy than the one in force: the version of that one
  FENCED    a later projector has the lease: its name, and the epoch of its lease
  WINDOW    by the Redis clock, the request's period is over or has not begun: now in ms
  SETTLED   the hold is settled already: "cost assumed", state, and of settle also the newest event
  UNKNOWN   no such hold
  MISMATCH  the hold stands against other budgets: their names, by line
  MOVED     the ledger ends elsewhere than the caller says: its newest sequence number; of apply_policy, another
            policy is in force than the caller says: its version
  ORPHAN    there is a stream without the ledger's identity
  BEHIND    there are newer events than the caller has counted, or a window is over: the number of the newest
  CHANGED   the hold was corrected since the caller has read it: its cost and assumed part
  LESS      less credit is left than is to be taken back: what is left
  EARLY     by the Redis clock, the credit has not expired yet: now in ms
  NONE      the user has no assigned plan
  TAKEN     another key has this key id or this hash
  REVOKED   the key is revoked from no later than that: from when in ms
Every function whose first argument is the ledger's id, but create, may answer LEDGER and BACK. Beside these:
  reserve   OK EXISTS CONFLICT DENIED WAIT STALE AHEAD DIVERGED STOPPED POLICY WINDOW
  record    OK DENIED WAIT STALE AHEAD DIVERGED STOPPED POLICY SETTLED UNKNOWN MISMATCH
  note      OK UNKNOWN
  settle    OK STALE AHEAD DIVERGED SETTLED UNKNOWN MISMATCH
  adjust    OK STALE AHEAD DIVERGED UNKNOWN MISMATCH CHANGED
  release   OK EXISTS STALE AHEAD DIVERGED UNKNOWN MISMATCH CHANGED
  charge    OK EXISTS CONFLICT STALE AHEAD DIVERGED POLICY
  assign    OK EXISTS CONFLICT
  withdraw  OK EXISTS CONFLICT LESS NONE
  change_credit OK EXISTS CONFLICT LESS EARLY STALE AHEAD DIVERGED POLICY
  create_key OK EXISTS CONFLICT TAKEN
  revoke_key OK EXISTS CONFLICT UNKNOWN REVOKED
  trim      OK
  forget_alerts OK
  stop      OK FENCED
  create    OK ORPHAN
  restore   OK DIVERGED MOVED
  recovered OK MOVED
  balance   OK STALE AHEAD DIVERGED STOPPED POLICY
  apply_policy OK EXISTS MOVED BEHIND STOPPED
  probe     OK
What has been spent is booked all the same while calls are stopped: settle, adjust and charge never answer STOPPED.
renew, dead_letter, trim_tasks, remove_consumer and permissions answer without a code.
Programming errors are raised as error replies that begin with TOLLBOOK.
]]
