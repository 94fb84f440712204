-- Takes items out, wherever they are. ARGV: `all`, or `promised` for those that were promised
-- room and not added; id*. Replies with their number.
local removed = 0
for at = 2, #ARGV do
  local id = ARGV[at]
  local _, place, lane = find(id)
  if place and (ARGV[1] == 'all' or place == PROMISED) then
    take_out(id, place, lane)
    forget(id, lane)
    removed = removed + 1
  end
end
return removed
