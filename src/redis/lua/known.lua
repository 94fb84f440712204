-- Says where items are. ARGV: id*. Replies for each with its attempt, or -1 when it waits
-- nowhere; what was thought to be somewhere and is not is forgotten.
local reply = {}
for index, id in ipairs(ARGV) do
  local attempt, place, lane = find(id)
  if attempt and place ~= PROMISED and not present(id, place, lane) then
    take_out(id, place, lane)
    forget(id, lane)
    attempt = nil
  end
  if not attempt or place == PROMISED then attempt = -1 end
  reply[index] = attempt
end
return reply
