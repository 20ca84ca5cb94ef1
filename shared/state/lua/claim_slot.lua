-- Take the lowest free slot for a worker; answers its number, or -1 if all are taken.
-- KEYS: up, worker, credits, block feed, then the slots 0, 1, 2, ...
-- ARGV: incarnation, lease_ms, traces_ms, then fields and values of the worker.
-- Invariant: a slot has one holder and an incarnation holds one slot. Made again by the same incarnation it finds the
-- slot that it holds already.

local FIRST_SLOT = 5
local incarnation, lease_ms, traces_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
touch_up(KEYS[1], now_ms(), lease_ms)

local slots = {}
for i = FIRST_SLOT, #KEYS do
  slots[#slots + 1] = KEYS[i]
end
local holders = redis.call('MGET', unpack(slots))
local chosen
for i = 1, #slots do
  if holders[i] == incarnation then
    chosen = i
    break
  elseif not holders[i] and not chosen then
    chosen = i
  end
end
if not chosen then
  return -1
end
redis.call('SET', slots[chosen], incarnation, 'PX', lease_ms)
redis.call('HSET', KEYS[2], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[2], lease_ms)
redis.call('PEXPIRE', KEYS[3], traces_ms)
redis.call('PEXPIRE', KEYS[4], traces_ms)
return chosen - 1
