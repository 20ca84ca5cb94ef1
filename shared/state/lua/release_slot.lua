-- Give a slot back.
-- KEYS: slot, worker. ARGV: incarnation.
-- Invariant: nobody releases a slot that another holds. Made again it finds nothing of its own.

if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1], KEYS[2])
end
return 1
