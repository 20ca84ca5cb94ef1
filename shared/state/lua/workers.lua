-- All workers whose lease stands: for each its slot, incarnation, version, load, pages, number and work (us) of credits
-- taken, card and speeds, in one flat list. Card and speeds are left out where the asker knows this version of them.
-- KEYS: the slots 0, 1, 2, ... ARGV: what stands before the incarnation in the keys of worker and credits, then for each
-- slot the version that the asker knows, or ''.
-- Reads only.

local answer = {}
local holders = redis.call('MGET', unpack(KEYS))
for i = 1, #KEYS do
  local incarnation = holders[i]
  if incarnation then
    local worker = ARGV[1] .. incarnation
    local version, load = unpack(redis.call('HMGET', worker, 'version', 'load'))
    local count, total, work_us = num_credits(ARGV[2] .. incarnation)
    local card, speeds = false, false
    if version ~= ARGV[2 + i] then
      card, speeds = unpack(redis.call('HMGET', worker, 'card', 'speeds'))
    end
    local n = #answer
    answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] = i - 1, incarnation, version, load
    answer[n + 5], answer[n + 6], answer[n + 7] = total, count, work_us
    answer[n + 8], answer[n + 9] = card, speeds
  end
end
return answer
