-- Append to a worker's block feed; a full list takes the place of all that stood there, and answers who wanted it.
-- KEYS: block feed, blocks wanted.
-- ARGV: sequence, feed length, traces_ms, "full" or "more", then fields and values of the entry.
-- Invariant: the entries' sequence numbers rise. Made again it finds its entry, or a later one, and changes nothing: who
-- has asked for a full list since is still to be answered.

local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last and tonumber(string.match(last[1], '^%d+')) > tonumber(ARGV[1]) then
  return 0
end
if ARGV[4] == 'full' then
  redis.call('DEL', KEYS[1], KEYS[2])
end
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], string.format('%.0f-0', tonumber(ARGV[1]) + 1), unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
