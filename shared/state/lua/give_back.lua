-- Return a placement's credits on one worker.
-- KEYS: credits. ARGV: placement id.
-- Invariant: `total` is the sum of the other fields. Made again it finds no such credit and changes nothing.

local pages = redis.call('HGET', KEYS[1], ARGV[1])
if pages then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HINCRBY', KEYS[1], 'total', -tonumber(pages))
end
return 1
