-- Renew a membership and settle its share of the partitions; answers the partitions it holds.
-- KEYS: up, members, partitions. ARGV: member, num_partitions, lease_ms.
-- Invariant: a partition has one holder, and only members whose membership stands hold any. A member gives up what is
-- over its share and takes only what is free, so no partition changes hands without its holder having been told or
-- its holder's lease having ended. Shares differ by one at most: num_partitions mod members of them may be larger, and
-- whoever has a larger one keeps it. Made again it settles again, which changes nothing.

local member, num_partitions, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
touch_up(KEYS[1], now, lease_ms)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + lease_ms, member)
redis.call('PEXPIRE', KEYS[2], lease_ms)

local lives, num_held = {}, {}
for _, name in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  lives[name], num_held[name] = true, 0
end
local num_members = redis.call('ZCARD', KEYS[2])

local mine, free = {}, {}
local leases = redis.call('HGETALL', KEYS[3])
local holders = {}
for i = 1, #leases, 2 do
  holders[tonumber(leases[i])] = leases[i + 1]
end
for partition = 0, num_partitions - 1 do
  local holder = holders[partition]
  if holder == member then
    mine[#mine + 1] = partition
  elseif holder and lives[holder] then
    num_held[holder] = num_held[holder] + 1
  else
    free[#free + 1] = partition
  end
end

local smaller = math.floor(num_partitions / num_members)
local larger_left = num_partitions % num_members
for name, count in pairs(num_held) do
  if name ~= member and count > smaller then
    larger_left = larger_left - 1
  end
end
local share = larger_left > 0 and smaller + 1 or smaller

while #mine > share do
  redis.call('HDEL', KEYS[3], table.remove(mine))
end
for _, partition in ipairs(free) do
  if #mine >= share then
    break
  end
  redis.call('HSET', KEYS[3], partition, member)
  mine[#mine + 1] = partition
end
redis.call('PEXPIRE', KEYS[3], lease_ms)
return mine
