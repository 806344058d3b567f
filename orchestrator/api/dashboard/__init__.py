"""The pages: what the rows say, in HTML made on the server, with a little JavaScript beside it."""
