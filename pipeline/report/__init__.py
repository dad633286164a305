"""One HTML file that shows runs: what they did, what it cost, and why they decided as they did."""
