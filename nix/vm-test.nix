{ self }: { name = "x"; nodes.machine = { imports = [ self.nixosModules.default ]; }; testScript = ""; }
