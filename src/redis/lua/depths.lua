-- Lists the depths. Replies: (account, depth)*.
return redis.call('HGETALL', DEPTH)
