-- Return the work of a placement's credits on one worker; its pages stay taken.
-- KEYS: credits. ARGV: placement id.
-- Invariant: as in give_back. Made again it finds a credit without work, or none, and changes nothing.

local taken = redis.call('HGET', KEYS[1], ARGV[1])
if taken then
  local pages, ends_ms, work_us = read_credit(taken)
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %.0f 0', pages, ends_ms))
  redis.call('HINCRBY', KEYS[1], 'work', 0 - work_us)
end
return 1
