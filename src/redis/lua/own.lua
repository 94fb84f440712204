-- Lists what a consumer has by the server's account. ARGV: consumer, lane*.
-- Replies: (index of lane, entry, id, attempt, data)*.
local reply = {}
for at = 2, #ARGV do
  local lane = ARGV[at]
  local got = redis.pcall('XREADGROUP', 'GROUP', GROUP, ARGV[1], 'STREAMS', stream(lane), '0')
  if got and not got.err then
    for _, entry in ipairs(got[1][2]) do tell(reply, at - 1, lane, entry) end
  end
end
return reply
