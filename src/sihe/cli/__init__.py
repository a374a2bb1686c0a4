"""The composition root: `sihe <noun> <verb>` joins the commands of every room."""
