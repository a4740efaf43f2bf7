"""The library's functions, a file and a request for each command; `streamer` has them all."""
