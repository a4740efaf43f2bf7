"""Define the library's functions, with one file and one request for each command; `streamer` exports the functions."""
