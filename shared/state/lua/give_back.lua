-- Return a placement's credits on one worker.
-- KEYS: credits. ARGV: placement id.
-- Invariant: `total` is the sum of the pages in the other fields. Made again it finds no such credit and changes nothing.

local taken = redis.call('HGET', KEYS[1], ARGV[1])
if taken then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HINCRBY', KEYS[1], 'total', -tonumber(string.match(taken, '^%d+')))
end
return 1
