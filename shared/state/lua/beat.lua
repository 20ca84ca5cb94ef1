-- Renew a slot's lease, publish the load and drop credits whose time is over; answers 0 if the lease was lost, 1, or 2 if
-- somebody wants the full list of the worker's blocks.
-- KEYS: up, worker, credits, block feed, slot, blocks wanted.
-- ARGV: incarnation, lease_ms, traces_ms, then fields and values of the worker.
-- Invariant: only the holder renews. A free slot is taken again only if the store itself was away or emptied less than
-- a lease ago, for then the lease ended through no fault of its holder. Made again it renews again.

local incarnation, lease_ms, traces_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local up_ms = touch_up(KEYS[1], now, lease_ms)
local holder = redis.call('GET', KEYS[5])
if holder and holder ~= incarnation then
  return 0
end
if not holder and up_ms >= lease_ms then
  return 0
end
redis.call('SET', KEYS[5], incarnation, 'PX', lease_ms)
redis.call('HSET', KEYS[2], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[2], lease_ms)
local credits = redis.call('HGETALL', KEYS[3])
for i = 1, #credits, 2 do
  local pages, ends_ms, work_us = read_credit(credits[i + 1])
  if ends_ms and ends_ms <= now then
    redis.call('HDEL', KEYS[3], credits[i])
    redis.call('HINCRBY', KEYS[3], 'total', 0 - pages)
    redis.call('HINCRBY', KEYS[3], 'work', 0 - work_us)
  end
end
redis.call('PEXPIRE', KEYS[3], traces_ms)
redis.call('PEXPIRE', KEYS[4], traces_ms)
return redis.call('GET', KEYS[6]) and 2 or 1
