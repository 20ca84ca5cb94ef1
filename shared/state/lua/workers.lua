-- All workers whose lease stands: for each its slot, card, load, speeds, and pages, number and work (us) of credits
-- taken, in one flat list.
-- KEYS: the slots 0, 1, 2, ... ARGV: what stands before the incarnation in the keys of worker and credits.
-- Reads only.

local answer = {}
local holders = redis.call('MGET', unpack(KEYS))
for i = 1, #KEYS do
  local incarnation = holders[i]
  if incarnation then
    local worker = redis.call('HMGET', ARGV[1] .. incarnation, 'card', 'load', 'speeds')
    if worker[1] then
      local count, total, work_us = num_credits(ARGV[2] .. incarnation)
      local n = #answer
      answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] = i - 1, worker[1], worker[2], worker[3]
      answer[n + 5], answer[n + 6], answer[n + 7] = total, count, work_us
    end
  end
end
return answer
