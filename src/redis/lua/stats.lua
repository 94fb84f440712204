-- Counts lanes. ARGV: lane*. Replies: the server's time in milliseconds, then for each lane its
-- entries, how many of them are delivered, and since when the oldest waits or -1.
local reply = { now_ms() }
for _, lane in ipairs(ARGV) do
  local key = stream(lane)
  local pending, oldest = redis.pcall('XPENDING', key, GROUP), redis.call('XRANGE', key, '-', '+', 'COUNT', 1)
  reply[#reply + 1] = redis.call('XLEN', key)
  reply[#reply + 1] = pending.err and 0 or pending[1]
  reply[#reply + 1] = oldest[1] and tonumber(string.match(oldest[1][1], '^%d+')) or -1
end
return reply
