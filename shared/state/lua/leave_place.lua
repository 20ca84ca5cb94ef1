-- Give a request's place back, and charge what it cost instead of what was guessed; answers 1 if it had one.
-- KEYS: place. ARGV: request id, tokens, what stands before the tenant in the keys of places and budgets.
-- Invariant: a place is given back once, with its record. Made again it finds no record and changes nothing.

local UNITS = 60000
local found = redis.call('GET', KEYS[1])
if not found then
  return 0
end
local cost, tenant = string.match(found, '^(%d+) (.*)$')
redis.call('DEL', KEYS[1])
redis.call('ZREM', ARGV[3] .. tenant, ARGV[1])
local budgets = ARGV[4] .. tenant
if redis.call('HGET', budgets, 'tokens') then
  redis.call('HINCRBY', budgets, 'tokens', string.format('%.0f', (tonumber(cost) - tonumber(ARGV[2])) * UNITS))
end
return 1
