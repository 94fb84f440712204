-- Takes over what other consumers had for too long. ARGV: consumer, most to take, milliseconds,
-- lane*. Replies: (index of lane, entry, id, attempt, data)*.
local consumer, want, reply = ARGV[1], tonumber(ARGV[2]), {}
for at = 4, #ARGV do
  if want <= 0 then break end
  want = want - take_over(reply, at - 3, ARGV[at], consumer, ARGV[3], want)
end
return reply
