-- Counts lanes. ARGV: lane*. Replies: the server's time in milliseconds, then for each lane its
-- entries, how many of them are with consumers, since when the oldest waits or -1, and the data of
-- the item that a pull would get and of the youngest, or nothing.
local function delivered(key)
  local pending = redis.pcall('XPENDING', key, GROUP)
  if pending.err then return 0 end
  local number = pending[1]
  for _, consumer in ipairs(pending[4] or {}) do
    -- What was given back is nobody's.
    if consumer[1] == '-' then number = number - tonumber(consumer[2]) end
  end
  return number
end

local reply = { now_ms() }
for _, lane in ipairs(ARGV) do
  local key = stream(lane)
  local oldest = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)
  local following = next_of(lane)
  reply[#reply + 1] = redis.call('XLEN', key)
  reply[#reply + 1] = delivered(key)
  reply[#reply + 1] = oldest[1] and tonumber(string.match(oldest[1][1], '^%d+')) or -1
  reply[#reply + 1] = following and following[2][6] or false
  local youngest = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  reply[#reply + 1] = youngest and youngest[2][6] or false
end
return reply
