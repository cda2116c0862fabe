"""Two models of one architecture in one: weights averaged part by part, and the ratios that do it best."""
