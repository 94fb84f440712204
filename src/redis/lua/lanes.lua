-- Lists the lanes. Replies: (lane, info)*.
local reply = {}
for _, lane in ipairs(redis.call('ZRANGE', LANES, 0, -1)) do
  reply[#reply + 1] = lane
  reply[#reply + 1] = redis.call('HGET', INFO, lane) or ''
end
return reply
