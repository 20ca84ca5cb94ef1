-- The backlogs published less than a lease ago: for each the member, its age in ms and the report, in one flat list.
-- KEYS: backlogs. ARGV: lease_ms.
-- Reads only.

local now, answer = now_ms(), {}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  local at, report = string.match(entries[i + 1], '^(%d+) (.*)$')
  if now - tonumber(at) < tonumber(ARGV[1]) then
    answer[#answer + 1] = entries[i]
    answer[#answer + 1] = math.max(0, now - tonumber(at))
    answer[#answer + 1] = report
  end
end
return answer
