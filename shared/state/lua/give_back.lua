-- Return a placement's credits on one worker.
-- KEYS: credits. ARGV: placement id.
-- Invariant: `total` is the sum of the pages and `work` that of the work in the other fields. Made again it finds no such
-- credit and changes nothing.

local taken = redis.call('HGET', KEYS[1], ARGV[1])
if taken then
  local pages, _, work_us = read_credit(taken)
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HINCRBY', KEYS[1], 'total', 0 - pages)
  redis.call('HINCRBY', KEYS[1], 'work', 0 - work_us)
end
return 1
