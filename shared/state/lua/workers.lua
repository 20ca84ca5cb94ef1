-- All workers whose lease stands: for each its slot, card, load, pages and number of credits taken, in one flat list.
-- KEYS: the slots 0, 1, 2, ... ARGV: what stands before the incarnation in the keys of worker and credits.
-- Reads only.

local answer = {}
local holders = redis.call('MGET', unpack(KEYS))
for i = 1, #KEYS do
  local incarnation = holders[i]
  if incarnation then
    local worker = redis.call('HMGET', ARGV[1] .. incarnation, 'card', 'load')
    if worker[1] then
      local credits = ARGV[2] .. incarnation
      local total = redis.call('HGET', credits, 'total')
      local count = total and redis.call('HLEN', credits) - 1 or 0
      local n = #answer
      answer[n + 1], answer[n + 2], answer[n + 3] = i - 1, worker[1], worker[2]
      answer[n + 4], answer[n + 5] = tonumber(total or 0), count
    end
  end
end
return answer
