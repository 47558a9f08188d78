"""What a pair differs in, and what a λ will do, told before anything is trained."""
