-- Give up membership and all partitions.
-- KEYS: members, partitions. ARGV: member.
-- Invariant: nobody gives up what another holds. Made again it finds nothing of its own.

redis.call('ZREM', KEYS[1], ARGV[1])
local leases = redis.call('HGETALL', KEYS[2])
for i = 1, #leases, 2 do
  if leases[i + 1] == ARGV[1] then
    redis.call('HDEL', KEYS[2], leases[i])
  end
end
return 1
