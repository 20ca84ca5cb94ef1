-- Publish a backlog and drop those that nobody renews.
-- KEYS: backlogs. ARGV: member, report, lease_ms.
-- Invariant: a member has one entry. Made again it says the same a little later.

local now, lease_ms = now_ms(), tonumber(ARGV[3])
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  if now - tonumber(string.match(entries[i + 1], '^%d+')) >= lease_ms then
    redis.call('HDEL', KEYS[1], entries[i])
  end
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f ', now) .. ARGV[2])
redis.call('PEXPIRE', KEYS[1], lease_ms)
return 1
