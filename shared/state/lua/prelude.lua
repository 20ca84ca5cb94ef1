-- Put in front of every script: the store's own clock, how long the store has been up, and what a credit says.

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Milliseconds since when somebody has written here without a gap of half a lease. An emptied store starts at 0, and so
-- does one that nobody could reach for a while: what expired meanwhile says nothing about those who held it. (Half a
-- lease: that long away, with the beat before it and the one behind it, is what costs a lease.)
local function touch_up(up_key, now, lease_ms)
  local since, last
  local found = redis.call('GET', up_key)
  if found then
    since, last = string.match(found, '^(%d+) (%d+)$')
    since, last = tonumber(since), tonumber(last)
  end
  if not since or now - last > lease_ms / 2 then
    since = now
  end
  redis.call('SET', up_key, string.format('%.0f %.0f', since, now))
  return now - since
end

-- Pages, end (ms) and work (us) of a placement's credit; nothing for the sums that stand beside the credits.
local function read_credit(text)
  local pages, ends_ms, work_us = string.match(text, '^(%d+) (%d+) (%d+)$')
  return tonumber(pages), tonumber(ends_ms), tonumber(work_us)
end

-- How many credits are taken on a worker, their pages and their work (us).
local function num_credits(credits_key)
  local sums = redis.call('HMGET', credits_key, 'total', 'work')
  return redis.call('HLEN', credits_key) - (sums[1] and 1 or 0) - (sums[2] and 1 or 0), tonumber(sums[1] or 0), tonumber(sums[2] or 0)
end
