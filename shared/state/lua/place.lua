-- Record a placement and take its credits; answers the placement that stands, or false if a worker cannot take it.
-- KEYS: placement, then for each of its one or two workers: slot, worker, credits.
-- ARGV: placement (JSON), placement id, keep_ms, traces_ms, then for each worker: incarnation, pages, work_us.
-- Invariant: nothing is placed on a worker that has said it is draining, or that the log is away. `total` of a worker's
-- credits is the sum of the pages and `work` that of the work in the others of that hash; `total` is at most its
-- num_pages, the others are at most as many as its max_running, and a placement's credits are taken once, with its
-- record. The operation's name is the key of the record: made again it finds the record and takes nothing, even if the
-- credits have been given back since.

local standing = redis.call('GET', KEYS[1])
if standing then
  return standing
end
local num_workers = (#KEYS - 1) / 3
local function args_of(i)
  return ARGV[5 + 3 * i], tonumber(ARGV[6 + 3 * i]), tonumber(ARGV[7 + 3 * i])
end
for i = 0, num_workers - 1 do
  local slot, worker, credits = KEYS[2 + 3 * i], KEYS[3 + 3 * i], KEYS[4 + 3 * i]
  local incarnation, need = args_of(i)
  if redis.call('GET', slot) ~= incarnation then
    return false
  end
  local takes_work, num_pages, max_running =
    unpack(redis.call('HMGET', worker, 'takes_work', 'num_pages', 'max_running'))
  local count, total = num_credits(credits)
  if takes_work ~= '1' or count >= tonumber(max_running) or total + need > tonumber(num_pages) then
    return false
  end
end
local ends_ms = now_ms() + tonumber(ARGV[3])
for i = 0, num_workers - 1 do
  local credits, _, need, work_us = KEYS[4 + 3 * i], args_of(i)
  redis.call('HSET', credits, ARGV[2], string.format('%.0f %.0f %.0f', need, ends_ms, work_us))
  redis.call('HINCRBY', credits, 'total', need)
  redis.call('HINCRBY', credits, 'work', work_us)
  redis.call('PEXPIRE', credits, tonumber(ARGV[4]))
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', tonumber(ARGV[3]))
return ARGV[1]
