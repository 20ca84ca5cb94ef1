-- Accept a request for a tenant, within its limits; answers the limit that stands against it ('' for none) and ms until
-- it may ask again, then of requests and of tokens: how much is left and ms until all of it is there again.
-- KEYS: place, places, budgets.
-- ARGV: request id, tenant, cost, keep_ms, max_concurrent, requests_per_minute, tokens_per_minute; -1 is no limit.
-- Invariant: a request has one place and is charged once, with its record. Made again it finds the record and charges
-- nothing. Budgets count in UNITS, of which as many grow in a ms as are allowed in a minute: up to one minute's worth. A
-- cost above that waits for a full budget and leaves a debt.

local UNITS = 60000
local request_id, tenant, cost, keep_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local max_concurrent = tonumber(ARGV[5])
local names, costs = {'requests', 'tokens'}, {1, cost}
local limits = {tonumber(ARGV[6]), tonumber(ARGV[7])}
local now = now_ms()

local found = redis.call('HMGET', KEYS[3], 'at_ms', 'requests', 'tokens')
local passed_ms = math.max(0, now - tonumber(found[1] or now))
local left = {}
for i = 1, 2 do
  local full = limits[i] * UNITS
  left[i] = math.min(full, tonumber(found[i + 1] or full) + limits[i] * passed_ms)
end

redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local why, retry_ms = '', 0
if not redis.call('GET', KEYS[1]) then
  if max_concurrent >= 0 and redis.call('ZCARD', KEYS[2]) >= max_concurrent then
    why, retry_ms = 'concurrent', 1000
  end
  for i = 1, 2 do
    local wanted = math.min(costs[i], limits[i]) * UNITS
    if why == '' and limits[i] > 0 and left[i] < wanted then
      why, retry_ms = names[i], math.ceil((wanted - left[i]) / limits[i])
    end
  end
  if why == '' then
    left[1], left[2] = left[1] - costs[1] * UNITS, left[2] - costs[2] * UNITS
    redis.call('SET', KEYS[1], string.format('%.0f ', cost) .. tenant, 'PX', keep_ms)
    redis.call('ZADD', KEYS[2], now + keep_ms, request_id)
    local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
    redis.call('PEXPIRE', KEYS[2], string.format('%.0f', tonumber(last[2]) - now))
  end
end

local answer, longest_ms = {why, retry_ms}, 0
for i = 1, 2 do
  local full_ms = 0
  if limits[i] > 0 then
    full_ms = math.ceil((limits[i] * UNITS - left[i]) / limits[i])
    redis.call('HSET', KEYS[3], names[i], string.format('%.0f', left[i]))
  else
    redis.call('HDEL', KEYS[3], names[i])
  end
  answer[#answer + 1] = math.max(0, math.floor(left[i] / UNITS))
  answer[#answer + 1] = full_ms
  longest_ms = math.max(longest_ms, full_ms)
end
redis.call('HSET', KEYS[3], 'at_ms', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[3], string.format('%.0f', longest_ms + 60000))
return answer
