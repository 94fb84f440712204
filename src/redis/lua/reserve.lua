-- Promises room in the accounts of lanes. ARGV: milliseconds until a promise lapses, (lane, id,
-- limit)*. Replies for each with -1 when granted, otherwise with the depth that was in the way.
local until_ms, reply = whole(now_ms() + tonumber(ARGV[1])), {}
for at = 2, #ARGV, 3 do
  local lane, id, limit = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local outcome = -1
  if not find(id) then
    local depth = tonumber(redis.call('HGET', DEPTH, account(lane)) or '0')
    if depth >= limit then
      outcome = depth
    else
      count(lane, 1)
      redis.call('ZADD', RESERVED, until_ms, id)
      know(id, 0, PROMISED, lane)
    end
  end
  reply[#reply + 1] = outcome
end
return reply
