-- Moves what is due to its lane, and lets go of promises that were not kept in time.
-- ARGV: most to move. Replies: moved, promises let go, milliseconds to the next one due or -1.
local time, most, moved, rung = now_ms(), ARGV[1], 0, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', DELAYED, '-inf', whole(time), 'LIMIT', 0, most)) do
  local data = redis.call('HGET', DATA, id)
  redis.call('ZREM', DELAYED, id)
  redis.call('HDEL', DATA, id)
  local attempt, place, lane = find(id)
  if place == HELD and data then
    put(lane, id, attempt, data)
    rung[lane] = true
    moved = moved + 1
  elseif place == HELD then
    forget(id, lane)
  end
end
local let_go = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', RESERVED, '-inf', whole(time), 'LIMIT', 0, most)) do
  redis.call('ZREM', RESERVED, id)
  local _, place, lane = find(id)
  if place == PROMISED then
    forget(id, lane)
    let_go = let_go + 1
  end
end
for lane in pairs(rung) do redis.call('PUBLISH', BELL, lane) end
local next = redis.call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')
local wait = -1
if next[2] then wait = math.max(0, tonumber(next[2]) - time) end
return { moved, let_go, wait }
