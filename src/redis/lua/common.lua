-- Put before every script. KEYS[1] is the prefix of all keys.
local P = KEYS[1]
local KNOWN, DEPTH, GROUPS, DELAYED = P .. 'known', P .. 'depth', P .. 'groups', P .. 'delayed'
local DATA = P .. 'data'
local RESERVED, LANES, INFO, GIVEN = P .. 'reserved', P .. 'lanes', P .. 'info', P .. 'given'
local ERA, BELL, GROUP = P .. 'era', P .. 'bell', 'baton'
-- Places of an item besides an entry of a stream.
local HELD, PROMISED = 'd', 'r'
-- What no entry reaches by waiting: given back, so that anybody may take it at once.
local GIVEN_IDLE = '157680000000'

local function stream(lane) return P .. 'q:' .. lane end

local function account(lane) return string.match(lane, '^(.*):[^:]*:%d+$') end

-- What stands before the first slash of an account; the whole where there is none.
local function group(lane) return string.match(account(lane), '^[^/]*') end

local function whole(number) return string.format('%.0f', number) end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Changes the depths of a lane's account and group; fields of 0 are not kept.
local function count(lane, by)
  local one, all = account(lane), group(lane)
  if redis.call('HINCRBY', DEPTH, one, by) <= 0 then redis.call('HDEL', DEPTH, one) end
  if redis.call('HINCRBY', GROUPS, all, by) <= 0 then redis.call('HDEL', GROUPS, all) end
end

-- Attempt, place and lane of a known item; nothing for an unknown one.
local function find(id)
  local was = redis.call('HGET', KNOWN, id)
  if not was then return nil end
  local attempt, place, lane = string.match(was, '^(%d+) (%S+) (.*)$')
  return tonumber(attempt), place, lane
end

local function know(id, attempt, place, lane)
  redis.call('HSET', KNOWN, id, whole(attempt) .. ' ' .. place .. ' ' .. lane)
end

local function forget(id, lane)
  redis.call('HDEL', KNOWN, id)
  count(lane, -1)
end

-- Whether the item is where it is said to be.
local function present(id, place, lane)
  if place == PROMISED then return false end
  if place == HELD then return redis.call('ZSCORE', DELAYED, id) ~= false end
  return #redis.call('XRANGE', stream(lane), place, place) == 1
end

local function end_entry(lane, entry)
  local key = stream(lane)
  redis.pcall('XACK', key, GROUP, entry)
  return redis.call('XDEL', key, entry)
end

-- Takes the item from where it is.
local function take_out(id, place, lane)
  if place == PROMISED then
    redis.call('ZREM', RESERVED, id)
  elseif place == HELD then
    redis.call('ZREM', DELAYED, id)
    redis.call('HDEL', DATA, id)
  else
    end_entry(lane, place)
  end
end

-- Lists the lane, in use until `time` at least, and makes its stream and group.
local function open(lane, info, time)
  if redis.call('ZADD', LANES, 'GT', whole(time), lane) == 1 then
    redis.call('HSET', INFO, lane, info)
    redis.pcall('XGROUP', 'CREATE', stream(lane), GROUP, '0', 'MKSTREAM')
  end
end

-- Makes room for this attempt of an item, and counts it; false when the same or a later attempt
-- is here already. The same attempt is moved out of the place `replaces` only.
local function admit(id, attempt, lane, replaces)
  local was, place, old = find(id)
  if not was then
    count(lane, 1)
    return true
  end
  if was > attempt then return false end
  if was == attempt and place ~= replaces and present(id, place, old) then return false end
  take_out(id, place, old)
  if account(old) ~= account(lane) then
    count(old, -1)
    count(lane, 1)
  end
  return true
end

local function put(lane, id, attempt, data)
  local entry = redis.call('XADD', stream(lane), '*', 'i', id, 'a', whole(attempt), 'd', data)
  know(id, attempt, entry, lane)
end

-- Appends an entry to a reply; what has lost its content is ended.
local function tell(reply, index, lane, entry)
  local fields = entry[2]
  if not fields or #fields < 6 then
    end_entry(lane, entry[1])
    return 0
  end
  for _, value in ipairs({ index, entry[1], fields[2], fields[4], fields[6] }) do
    reply[#reply + 1] = value
  end
  return 1
end

-- Takes over up to `want` entries of a lane that were idle for longer; also says whether there
-- may be more.
local function take_over(reply, index, lane, consumer, idle, want)
  local cursor, taken = '0-0', 0
  repeat
    local got = redis.pcall('XAUTOCLAIM', stream(lane), GROUP, consumer, idle, cursor,
      'COUNT', want - taken)
    if got.err then return taken, false end
    cursor = got[1]
    for _, entry in ipairs(got[2]) do
      if entry then taken = taken + tell(reply, index, lane, entry) end
    end
  until cursor == '0-0' or taken >= want
  return taken, cursor ~= '0-0'
end

local function value_of(info, name)
  for at = 1, #info, 2 do
    if info[at] == name then return info[at + 1] end
  end
end

-- The entry that a pull would get: given back, or delivered to nobody yet.
local function next_of(lane)
  local key = stream(lane)
  if redis.call('SISMEMBER', GIVEN, lane) == 1 then
    local given = redis.pcall('XPENDING', key, GROUP, 'IDLE', GIVEN_IDLE, '-', '+', 1)
    if not given.err and given[1] then
      return redis.call('XRANGE', key, given[1][1], given[1][1])[1]
    end
  end
  local groups, last = redis.pcall('XINFO', 'GROUPS', key), '0-0'
  if groups.err then return nil end
  for _, group in ipairs(groups) do
    if value_of(group, 'name') == GROUP then last = value_of(group, 'last-delivered-id') end
  end
  return redis.call('XRANGE', key, '(' .. last, '+', 'COUNT', 1)[1]
end
