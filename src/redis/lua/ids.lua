-- Lists known items in parts. ARGV: cursor, about how many. Replies: next cursor or 0, id*.
local got, reply = redis.call('HSCAN', KNOWN, ARGV[1], 'COUNT', ARGV[2]), {}
reply[1] = got[1]
for at = 1, #got[2], 2 do reply[#reply + 1] = got[2][at] end
return reply
