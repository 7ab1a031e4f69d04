# What `nix flake check` builds.
{
  self,
  nixpkgs,
  pkgs,
  built,
  nixfmt,
}:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) system isLinux;
  inherit (built) craneLib package sources;
  inherit (self.packages.${system}) static;
  exe = lib.getExe package;

  nixFiles = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.fileFilter (file: file.hasExt "nix") ../.;
  };

  # A store path as it stands in a file: Nix's digits know no e, which is what crane overwrites them with.
  storePath = "${builtins.storeDir}/[0-9a-df-np-sv-z]{32}-[a-zA-Z0-9+._?=-]+";

  rendered = import ./rendered.nix { inherit self nixpkgs system; };
in
{
  # The program starts, and holds no path of the toolchain or of a dependency's source.
  package = pkgs.runCommand "codex-responses-proxy-package" { } ''
    ${exe} --version
    ${exe} --help >/dev/null
    { grep -aohE '${storePath}' ${exe} || true; } | sort -u | tee $out
    if grep -E -- '-(cargo|rust|vendor|source|gcc-wrapper|clang-wrapper)' $out; then
      echo "the program holds paths of what it was built with" >&2
      exit 1
    fi
  '';

  clippy = craneLib.cargoClippy (
    built.dev
    // {
      src = sources.all;
      cargoClippyExtraArgs = "--all-targets -- --deny warnings";
    }
  );

  fmt = craneLib.cargoFmt { src = sources.all; };

  nextest = craneLib.cargoNextest (
    built.dev
    // {
      src = sources.all;
      cargoNextestExtraArgs = "--no-fail-fast --no-tests=pass";
      # where builds run as root, tests start the program as somebody else
      preCheck = ''chmod a+x "$NIX_BUILD_TOP"'';
    }
  );

  doc = craneLib.cargoDoc (
    built.dev
    // {
      env = built.dev.env // {
        RUSTDOCFLAGS = "--deny warnings";
      };
    }
  );

  # advisories change by the day and need the network; see CONTRIBUTING
  deny = craneLib.cargoDeny {
    src = sources.deny;
    cargoDenyChecks = "bans licenses sources";
  };

  nixfmt = pkgs.runCommand "codex-responses-proxy-nixfmt" { nativeBuildInputs = [ nixfmt ]; } ''
    find ${nixFiles} -name '*.nix' -print0 | xargs -0 nixfmt --check
    touch $out
  '';
}
// lib.optionalAttrs isLinux {
  # The static build runs, needs no loader and holds no store path at all.
  static = pkgs.runCommandCC "codex-responses-proxy-static" { } ''
    ${lib.getExe static} --version
    if readelf -lW ${lib.getExe static} | grep INTERP; then exit 1; fi
    if grep -aohE '${storePath}' ${lib.getExe static}; then exit 1; fi
    touch $out
  '';

  unit = import ./unit-check.nix { inherit pkgs package rendered; };

  examples = import ./examples-check.nix { inherit self nixpkgs pkgs; };

  vm = pkgs.testers.runNixOSTest (import ./vm-test.nix { inherit self; });
}
