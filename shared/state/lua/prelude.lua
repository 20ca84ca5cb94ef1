-- Put in front of every script: the store's own clock, and how long the store has been up.

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
