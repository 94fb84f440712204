-- Ends deliveries. ARGV: (lane, entry, id)*. Replies with the number of entries that went.
local ended = 0
for at = 1, #ARGV, 3 do
  local lane, entry, id = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  ended = ended + end_entry(lane, entry)
  local _, place, now_in = find(id)
  if place == entry and now_in == lane then forget(id, lane) end
end
return ended
